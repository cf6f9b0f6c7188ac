"""What a model is made of, read off its modules: layers, attentions, heads, residual branches."""
