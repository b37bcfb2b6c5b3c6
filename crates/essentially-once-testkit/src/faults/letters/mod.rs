//! What becomes of records that cannot be handled: handlers in trouble, operators who act at any
//! moment, and a check of everything that was done.

mod bases;
mod check;
mod history;
mod operator;
mod scene;
mod trouble;

pub(super) use self::{
    bases::{BASES, random_plan, single_troubles},
    scene::{LetterScene, Times},
};
pub use self::{
    operator::{Call, Verb},
    trouble::{Trouble, TroubleKind},
};
