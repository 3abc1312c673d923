"""What a trained model says about a folder of images: classes, nearest notes, reports, and where it looks."""
