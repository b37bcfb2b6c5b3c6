//! A cluster, and the clients of it.

mod address;
mod cluster;
mod durability;

pub(crate) use self::{
    cluster::{Cluster, Complaint, Context, READING, client},
    durability::durability,
};
