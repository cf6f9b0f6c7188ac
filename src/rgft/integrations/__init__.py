"""Training frameworks: a module each, which needs the framework, and what they share."""
