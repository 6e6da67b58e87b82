"""Where Ropewalk meets frameworks."""
