"""The model: base, attention, batch layouts, encoder, checkpoint."""
