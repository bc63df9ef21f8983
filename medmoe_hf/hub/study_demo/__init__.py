"""The part of the demo page that reads whole studies, with the code of `medmoe predict`."""
