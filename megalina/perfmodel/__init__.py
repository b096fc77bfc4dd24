"""One performance model of a step's list, in three folders, each on the ones before.

cost: what each instruction asks for, in bytes, products and seconds of a device.  sim: a list in virtual time on a network.
forecast: a configuration's price, that is memory and step time, and the search for the best plan."""
