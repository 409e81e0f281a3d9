"""From files to prepared images: what recipes name, opened, split, augmented and normalised."""
