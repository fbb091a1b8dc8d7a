"""What a trained model does, and the gradients through it: functions of a trace."""
