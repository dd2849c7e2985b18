"""Read text, and find the files that come with the package."""
