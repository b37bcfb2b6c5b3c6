//! The program on a SQLite file.

mod bad_input;
mod changing;
mod reading;
mod support;
mod transcript;
