"""The core: backbone, neck, encoder, queries, decoder, and the model made of them. It knows no head and no task."""
