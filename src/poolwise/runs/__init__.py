"""From a study to trained and scored trials."""
