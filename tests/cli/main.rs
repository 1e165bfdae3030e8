//! The built command, as a person or a script meets it: answers parse, other people's data comes out right, mistakes are told.
//! Nothing here downloads.

mod answers;
mod bench;
mod command;
mod data;
mod mistakes;
mod world;
