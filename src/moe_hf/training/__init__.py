"""Trains both families: arguments, Trainers, optimizer, callbacks and checkpoints."""
