//! Durations from the histograms that the kernel side fills.

use socktrace_common::{BUCKETS, bucket_start};

use crate::model::Times;

/// What a histogram says. `max_ns` is exact, and no percentile is above it.
pub(super) fn times(buckets: &[u64; BUCKETS], max_ns: u64) -> Times {
    let count: u64 = buckets.iter().sum();
    let at = |percent: u64| {
        // The sample that so many per cent of all are at or below, the first one being 1.
        let rank = (count * percent).div_ceil(100).max(1);
        let mut below = 0;
        let index = buckets.iter().position(|&samples| {
            below += samples;
            below >= rank
        });
        index.map_or(0, |index| middle(index).min(max_ns))
    };
    Times { count, p50_ns: at(50), p90_ns: at(90), p99_ns: at(99), max_ns }
}

/// What stands for all durations of a bucket.
fn middle(index: usize) -> u64 {
    if index == BUCKETS - 1 {
        // It has no end; the maximum is what is known.
        return u64::MAX;
    }
    u64::midpoint(bucket_start(index), bucket_start(index + 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use socktrace_common::bucket;

    #[test]
    fn percentiles_are_within_ten_per_cent() {
        for scale in [2_000, 70_000, 3_000_000, 450_000_000] {
            let samples: Vec<u64> = (1..=1000).map(|i| i * scale).collect();
            let mut buckets = [0; BUCKETS];
            for &sample in &samples {
                buckets[bucket(sample)] += 1;
            }
            let times = times(&buckets, *samples.last().unwrap());
            assert_eq!(times.count, 1000);
            for (got, rank) in [(times.p50_ns, 500), (times.p90_ns, 900), (times.p99_ns, 990)] {
                let truth = samples[rank - 1];
                assert!(got.abs_diff(truth) * 10 <= truth, "{got} is not {truth}");
            }
            assert_eq!(times.max_ns, 1000 * scale);
        }
    }

    #[test]
    fn one_sample_is_every_percentile_and_none_is_nothing() {
        let mut buckets = [0; BUCKETS];
        assert_eq!(times(&buckets, 0), Times::default());
        let hour = 3_600_000_000_000;
        buckets[bucket(hour)] = 1;
        let is = times(&buckets, hour);
        assert_eq!((is.p50_ns, is.p99_ns, is.max_ns), (hour, hour, hour));
    }
}
