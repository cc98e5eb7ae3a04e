"""Training of both families: arguments, Trainers, optimizer, callbacks and checkpoints."""
