"""Carrying plans out: the only code that touches the model or the optimizer."""
