"""What the gates of a model do with a text, and the page that shows it."""
