"""Exercises that mark themselves: backpropagation through a Vision Transformer, by hand, in plain NumPy.

Start at :mod:`minivit.learn.exercise` (what an exercise is) and ``ladder/e03_softmax.py`` (one of them).
"""
