"""What many mixers share above the ops."""
