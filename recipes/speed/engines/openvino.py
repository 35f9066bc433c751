PACKAGES = ()
BITS = ()
