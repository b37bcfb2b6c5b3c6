//! One module for each verb, or for several that belong together.

pub(crate) mod doctor;
pub(crate) mod journal;
pub(crate) mod letters;
pub(crate) mod moving;
pub(crate) mod pausing;
pub(crate) mod positions;
pub(crate) mod relay;
pub(crate) mod status;
pub(crate) mod tail;
