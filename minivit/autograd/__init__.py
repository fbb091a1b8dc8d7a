"""The engine: Tensors, the graph behind them, operations, and the check of their gradients."""
