"""From the encoder's features to the decoder's width, and often to fewer tokens."""
