"""Learning-rate schedules found while you train, for PyTorch Lightning."""
