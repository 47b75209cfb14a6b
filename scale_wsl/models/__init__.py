"""The network: a ResNeXt trunk that ends in features, and the hashtag head that no rank has to hold whole."""
