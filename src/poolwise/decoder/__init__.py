"""The base model: where it is, its attention masks, the layout of its batches, what is collected from its layers."""
