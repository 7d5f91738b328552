//! Averages in host memory that are written in the background: how engines on a device store theirs, without a device.

use super::host::HostEngine;
use crate::error::Result;
use crate::tracker::moment::{Failure, Moment};
use crate::tracker::values::OwnedValues;
use crate::tracker::writer::{Job, Writer};

/// The host's averages, each checkpoint copied and handed to a [`Writer`].
pub(in crate::tracker) struct QueuedEngine {
    pub(in crate::tracker) host: HostEngine,
    pub(in crate::tracker) writer: Writer,
}

impl QueuedEngine {
    pub(super) fn copy(&self) -> OwnedValues {
        let values = self.host.values();
        OwnedValues { averages: values.averages.to_vec(), copies: values.copies.to_vec(), converted: None }
    }

    pub(super) fn checkpoint(&self, moment: Moment) -> Result<(), Failure> {
        self.writer.submit(Job { moment, values: self.copy() }).map_err(Failure::Files)
    }
}
