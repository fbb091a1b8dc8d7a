"""Training: optimizers, schedules, one step, whole runs, and their checkpoints."""

from minivit.train.distill import Student, distillation
from minivit.train.evaluation import evaluate
from minivit.train.inference import predict_logits
from minivit.train.observers import Observer
from minivit.train.optim import SGD, AdamW, Muon, clip_grad_norm
from minivit.train.progress import Progress
from minivit.train.schedule import warmup_cosine, warmup_linear
from minivit.train.step import TrainStep
from minivit.train.trainer import Trainer
from minivit.weights.checkpoint import Checkpoint, load_checkpoint, parameters_hash, save_checkpoint

__all__ = [
    "SGD",
    "AdamW",
    "Checkpoint",
    "Muon",
    "Observer",
    "Progress",
    "Student",
    "TrainStep",
    "Trainer",
    "clip_grad_norm",
    "distillation",
    "evaluate",
    "load_checkpoint",
    "parameters_hash",
    "predict_logits",
    "save_checkpoint",
    "warmup_cosine",
    "warmup_linear",
]
