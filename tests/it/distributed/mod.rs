//! Jobs on several devices, in several processes, and ahead of themselves: the bits are those of one device that waits.

mod ahead;
mod links;
mod members;
mod nodes;
mod ranks;
