"""What the operator says: options, files, and the ``Config`` that comes of them."""
