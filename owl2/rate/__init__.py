"""`owl2 rate`: scores of image folders. The scorer itself is `owl2.scoring.scorer`."""
