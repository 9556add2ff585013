//! Order statistics of a handful of samples.

/// Samples in ascending order; never empty.
#[derive(Clone, Debug, PartialEq)]
pub struct Samples(Vec<f64>);

/// What is reported of a series.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Half of the samples are at or below this.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// How many there are.
    pub runs: usize,
}

impl Samples {
    /// Sorts `values`; `None` if there are none, or if one is not a number.
    #[must_use]
    pub fn new(mut values: Vec<f64>) -> Option<Self> {
        if values.is_empty() || values.iter().any(|value| value.is_nan()) {
            return None;
        }
        values.sort_by(f64::total_cmp);
        Some(Samples(values))
    }

    /// The value that `percent` per cent (0 to 100, more counts as 100) of the samples do not exceed, linearly between
    /// neighbours.
    #[must_use]
    pub fn percentile(&self, percent: u8) -> f64 {
        let last = self.0.len() - 1;
        let position = last * usize::from(percent.min(100));
        let low = position / 100;
        let between = u8::try_from(position % 100).map_or(0.0, f64::from) / 100.0;
        let (below, above) = (self.0[low], self.0[last.min(low + 1)]);
        if between == 0.0 { below } else { below * (1.0 - between) + above * between }
    }

    /// Median, extremes and number.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            median: self.percentile(50),
            min: self.percentile(0),
            max: self.percentile(100),
            runs: self.0.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn samples(values: &[f64]) -> Samples {
        Samples::new(values.to_vec()).unwrap()
    }

    #[test]
    fn nothing_and_not_a_number_have_no_statistics() {
        assert_eq!(Samples::new(vec![]), None);
        assert_eq!(Samples::new(vec![1.0, f64::NAN]), None);
    }

    #[test]
    fn one_sample_is_its_own_median_and_extremes() {
        assert_eq!(samples(&[3.5]).summary(), Summary { median: 3.5, min: 3.5, max: 3.5, runs: 1 });
    }

    #[test]
    fn median_of_an_odd_number_is_the_middle_one() {
        let summary = samples(&[9.0, 1.0, 2.0]).summary();
        assert_eq!(summary, Summary { median: 2.0, min: 1.0, max: 9.0, runs: 3 });
    }

    #[test]
    fn median_of_an_even_number_lies_between_the_middle_two() {
        assert!((samples(&[4.0, 1.0, 2.0, 100.0]).summary().median - 3.0).abs() < 1e-12);
    }

    #[test]
    fn percentiles_lie_linearly_between_neighbours() {
        let samples = samples(&[0.0, 10.0, 20.0, 30.0, 40.0]);
        for (percent, expected) in [(0, 0.0), (25, 10.0), (90, 36.0), (99, 39.6), (100, 40.0), (255, 40.0)] {
            assert!((samples.percentile(percent) - expected).abs() < 1e-9, "{percent}");
        }
    }

    proptest! {
        #[test]
        fn percentiles_ascend_and_stay_between_the_extremes(
            values in proptest::collection::vec(-1e9..1e9_f64, 1..40),
            a in 0_u8..=100,
            b in 0_u8..=100,
        ) {
            let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
            let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let samples = Samples::new(values).unwrap();
            let (low, high) = (samples.percentile(a.min(b)), samples.percentile(a.max(b)));
            prop_assert!(low <= high + 1e-6);
            prop_assert!(smallest - 1e-6 <= low && high <= largest + 1e-6);
            prop_assert_eq!(samples.percentile(0), smallest);
            prop_assert_eq!(samples.percentile(100), largest);
        }
    }
}
