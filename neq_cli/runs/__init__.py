"""What a run leaves behind and how it is read: files, inspection, comparison; never imports torch."""
