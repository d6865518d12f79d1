"""Pictures to ``pixel_values``, messages to ``input_ids``; NumPy, Pillow, tokenizers and Jinja2 alone."""
