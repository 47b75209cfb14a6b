"""From posts (an image with hashtags) to labelled shards, and back from shards to images and labels."""
