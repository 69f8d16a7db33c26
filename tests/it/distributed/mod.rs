//! Jobs whose models have several members: the bits are those of one.

mod members;
