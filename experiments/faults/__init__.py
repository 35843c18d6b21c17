"""The campaign of faults: short runs killed and damaged at random, and compared with calm ones."""
