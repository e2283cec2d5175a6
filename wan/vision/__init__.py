"""CLIP's vision model: pictures -> the features that an image branch takes."""
