"""Reading text, and the files that come with the package."""
