"""What is compared: the study file and the catalogue of designs. No torch."""
