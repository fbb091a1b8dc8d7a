import numpy as np


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def target(logits, labels, smoothing):
    classes = logits.shape[-1]
    return (1 - smoothing) * (labels[..., None] == np.arange(classes)) + smoothing / classes


def forward(logits, labels, smoothing):
    return -(target(logits, labels, smoothing) * log_softmax(logits)).sum(axis=-1).mean()


def backward(g, logits, labels, smoothing):
    p = np.exp(log_softmax(logits))
    return g * (p - target(logits, labels, smoothing)) / labels.size
