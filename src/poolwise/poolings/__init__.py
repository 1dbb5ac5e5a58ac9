"""The trainable poolings, their capacity controls, and how they are folded at inference."""
