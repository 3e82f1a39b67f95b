"""What mixers are made of: the protocol, declared weights, sharding rules, named shapes, packing, FLOPs."""
