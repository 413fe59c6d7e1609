"""The web page on which two users can be tried."""
