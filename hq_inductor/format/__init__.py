"""The bitstream, host side, in plain PyTorch: the specification that every kernel is tested against."""
