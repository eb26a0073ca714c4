//! The checker: which guarantees a history breaks. Pure, and without false alarms: of two events it takes an order as
//! given only if one call was sent after the other was answered, and a task as held only for as long as it must have been.
//!
//! A hold is proven from the moment the delivery was received: until the last applied call with its token was sent,
//! because a token that is lost never comes back; and until the lease ran out, counted from before it was asked for, or
//! the worker itself set out to end it, or somebody put back what was held for so long, or the grace was over after the
//! worker had left its stream. What a stream is told to have taken over is extended as by a heartbeat, and no grace counts
//! any more that began before; that a stream's leases are extended as long as it lives is not reckoned with.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use data_queue_proto::v1::Outcome;

use super::recorder::{Delivery, History, Intent, Leaving, Reclaim, Try};

/// The store counts in milliseconds, and by another clock than the callers.
const MARGIN: Duration = Duration::from_millis(10);

/// For how long what was held on a stream stays so when the stream is left.
const GRACE: Duration = Duration::from_secs(2);

/// A broken guarantee.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// G1: inserted, and never acked.
    Lost { id: String },
    /// G2: delivered, and never inserted.
    Phantom { id: String },
    /// G2: not what was inserted.
    Altered { id: String },
    /// G3: one id for two tasks, or not one id for each.
    Misnumbered { id: String },
    /// G3: replayed, though it was sent for the first time.
    ReplayedAtFirst { id: String },
    /// G4: two deliveries under one token.
    TokenRepeated { token: String },
    /// G4: two at the same time.
    HeldTwice { id: String },
    /// G5, G6: lost before its lease ran out, though its holder had not ended it.
    LostEarly { token: String },
    /// G5, G12: taken over by a stream of another session, or though no stream had brought it.
    TakenAway { token: String },
    /// G5: lost or ended, and then good again.
    Revived { token: String },
    /// G5: a call about a token that nobody was given took effect.
    Forged { token: String },
    /// G7: acked under two tokens, or applied twice under one.
    AckedTwice { id: String },
    /// G7: acked already, though no ack had been sent whose answer is not known.
    AckedBefore { token: String },
    /// G7: delivered after its ack was confirmed.
    AfterAck { id: String },
    /// G8: counters that contradict each other, or what was seen.
    Miscounted { id: String },
}

impl Fault {
    /// The id or the token that it is about.
    pub fn about(&self) -> &str {
        match self {
            Self::Lost { id }
            | Self::Phantom { id }
            | Self::Altered { id }
            | Self::Misnumbered { id }
            | Self::ReplayedAtFirst { id }
            | Self::HeldTwice { id }
            | Self::AckedTwice { id }
            | Self::AfterAck { id }
            | Self::Miscounted { id } => id,
            Self::TokenRepeated { token }
            | Self::LostEarly { token }
            | Self::TakenAway { token }
            | Self::Revived { token }
            | Self::Forged { token }
            | Self::AckedBefore { token } => token,
        }
    }
}

/// What is wrong with a history that has come to its end: everything was worked off.
pub fn faults(history: &History) -> BTreeSet<Fault> {
    let mut faults = BTreeSet::new();
    let inserted = inserted(history, &mut faults);
    let mut tries: BTreeMap<&str, Vec<&Try>> = BTreeMap::new();
    for one in &history.tries {
        tries.entry(&one.token).or_default().push(one);
    }
    let mut left: BTreeMap<&str, Vec<&Leaving>> = BTreeMap::new();
    for leaving in &history.leavings {
        left.entry(&leaving.token).or_default().push(leaving);
    }
    let mut tokens = BTreeSet::new();
    let mut tasks: BTreeMap<&str, Vec<Hold>> = BTreeMap::new();
    for delivery in &history.deliveries {
        let id = || delivery.id.clone();
        match inserted.get(delivery.id.as_str()) {
            None => drop(faults.insert(Fault::Phantom { id: id() })),
            Some(text) if *text != delivery.text => drop(faults.insert(Fault::Altered { id: id() })),
            Some(_) => {}
        }
        if !tokens.insert(delivery.token.as_str()) {
            faults.insert(Fault::TokenRepeated { token: delivery.token.clone() });
        }
        let token = delivery.token.as_str();
        let (tries, left) = (tries.get(token).map_or(&[][..], |all| all), left.get(token).map_or(&[][..], |all| all));
        let ends = [taken_back(delivery, tries, &history.reclaims), grace_over(tries, left)];
        let hold = Hold::of(delivery, tries, ends.into_iter().flatten().min(), &mut faults);
        tasks.entry(&delivery.id).or_default().push(hold);
    }
    for (token, tries) in &tries {
        // What a stream takes over may have been lost on its way to the worker.
        let resumed = tries.iter().any(|one| matches!(one.intent, Intent::Resume(_)));
        if !tokens.contains(token)
            && !resumed
            && tries.iter().any(|one| outcome(one).is_some_and(|it| it != Outcome::LeaseLost))
        {
            faults.insert(Fault::Forged { token: (*token).to_owned() });
        }
    }
    for id in inserted.keys().filter(|id| !tasks.contains_key(*id)) {
        faults.insert(Fault::Lost { id: (*id).to_owned() });
    }
    for (id, holds) in &tasks {
        task(id, holds, inserted.contains_key(id), &mut faults);
    }
    faults
}

/// Id to text.
fn inserted<'a>(history: &'a History, faults: &mut BTreeSet<Fault>) -> BTreeMap<&'a str, &'a str> {
    let mut inserted = BTreeMap::new();
    for insert in &history.inserts {
        let first = || insert.ids.first().cloned().unwrap_or_default();
        if insert.ids.len() != insert.texts.len() {
            faults.insert(Fault::Misnumbered { id: first() });
        }
        if insert.replayed && insert.sent < 2 {
            faults.insert(Fault::ReplayedAtFirst { id: first() });
        }
        for (id, text) in insert.ids.iter().zip(&insert.texts) {
            if inserted.insert(id.as_str(), text.as_str()).is_some() {
                faults.insert(Fault::Misnumbered { id: id.clone() });
            }
        }
    }
    inserted
}

/// All deliveries of one task.
fn task(id: &str, holds: &[Hold], inserted: bool, faults: &mut BTreeSet<Fault>) {
    let id = || id.to_owned();
    let acks = holds.iter().filter_map(|hold| hold.acked).collect::<Vec<_>>();
    if acks.is_empty() && inserted {
        faults.insert(Fault::Lost { id: id() });
    }
    if acks.len() > 1 {
        faults.insert(Fault::AckedTwice { id: id() });
    }
    if let Some(acked) = acks.iter().min()
        && holds.iter().any(|hold| hold.delivery.sent > *acked)
    {
        faults.insert(Fault::AfterAck { id: id() });
    }
    for (at, one) in holds.iter().enumerate() {
        if one.delivery.deliveries == 0 || one.delivery.expiries >= one.delivery.deliveries {
            faults.insert(Fault::Miscounted { id: id() });
        }
        for other in &holds[at + 1..] {
            let (one, other) =
                if one.delivery.answered <= other.delivery.answered { (one, other) } else { (other, one) };
            if one.until > other.delivery.answered && other.until > other.delivery.answered {
                faults.insert(Fault::HeldTwice { id: id() });
            }
            let (before, after) = (one.delivery, other.delivery);
            let in_order = before.deliveries < after.deliveries && before.expiries <= after.expiries;
            // All received deliveries count, so no two have one number.
            if before.deliveries == after.deliveries || before.answered < after.sent && !in_order {
                faults.insert(Fault::Miscounted { id: id() });
            }
        }
    }
}

/// A delivery, and how long it is proven to have held the task.
struct Hold<'a> {
    delivery: &'a Delivery,
    until: Duration,
    /// When its ack was first confirmed.
    acked: Option<Duration>,
}

impl<'a> Hold<'a> {
    /// Given the first moment at which somebody else may have ended it early.
    fn of(delivery: &'a Delivery, tries: &[&Try], ended: Option<Duration>, faults: &mut BTreeSet<Fault>) -> Self {
        let token = || delivery.token.clone();
        let applied = |one: &&&Try| outcome(one) == Some(Outcome::Applied);
        let lease_end = |one: &&Try| one.answer.and_then(|answer| answer.left).map(|left| one.sent + left);
        let ends = tries.iter().filter(applied).filter_map(lease_end);
        let lease_end = ends.chain([delivery.sent + delivery.left]).max().unwrap_or_default().saturating_sub(MARGIN);
        let ending = |one: &&&Try| {
            matches!(one.intent, Intent::Ack | Intent::PutBack) && outcome(one) != Some(Outcome::LeaseLost)
        };
        let ended_by_holder = tries.iter().filter(ending).map(|one| one.sent).min();
        let over = tries.iter().filter(ending).filter_map(|one| one.answer).map(|answer| answer.at).min();
        let ended = ended_by_holder.into_iter().chain(ended).min();
        let leased_until = ended.map_or(lease_end, |ended| ended.min(lease_end));
        let proven_until = tries.iter().filter(applied).map(|one| one.sent).max().unwrap_or_default();

        let (mut acked, mut acks_applied) = (None, 0);
        for one in tries {
            let Some(answer) = one.answer else { continue };
            match (one.intent, answer.outcome) {
                (_, Outcome::LeaseLost) => {
                    if answer.at < leased_until {
                        faults.insert(Fault::LostEarly { token: token() });
                    }
                    let good = |other: &&&Try| outcome(other).is_some_and(|it| it != Outcome::LeaseLost);
                    if tries.iter().filter(good).any(|other| other.sent > answer.at) {
                        faults.insert(Fault::Revived { token: token() });
                    }
                }
                (Intent::Resume(session), _) => {
                    if delivery.session != Some(session) {
                        faults.insert(Fault::TakenAway { token: token() });
                    }
                    if over.is_some_and(|over| over < one.sent) {
                        faults.insert(Fault::Revived { token: token() });
                    }
                }
                (Intent::Ack, Outcome::Applied) => {
                    acks_applied += 1;
                    acked = Some(acked.map_or(answer.at, |at: Duration| at.min(answer.at)));
                }
                (Intent::Ack, Outcome::AlreadyAcked) => {
                    let unanswered =
                        |other: &&&Try| other.intent == Intent::Ack && other.answer.is_none() && other.sent < one.sent;
                    if !tries.iter().any(|other| unanswered(&other)) {
                        faults.insert(Fault::AckedBefore { token: token() });
                    }
                    acked = Some(acked.map_or(answer.at, |at: Duration| at.min(answer.at)));
                }
                _ => {}
            }
        }
        if acks_applied > 1 {
            faults.insert(Fault::AckedTwice { id: delivery.id.clone() });
        }
        Self { delivery, until: leased_until.max(proven_until), acked }
    }
}

/// The first moment at which a Putback of what was held for some time may have taken a delivery back.
fn taken_back(delivery: &Delivery, tries: &[&Try], reclaims: &[Reclaim]) -> Option<Duration> {
    let moment = |reclaim: &Reclaim| {
        let renewed = |one: &&&Try| {
            one.intent == Intent::Heartbeat
                && one.answer.is_some_and(|answer| answer.outcome == Outcome::Applied && answer.at <= reclaim.sent)
        };
        let held_since = tries.iter().filter(renewed).map(|one| one.sent).chain([delivery.first_sent]).max()?;
        let moment = reclaim.sent.max((held_since + reclaim.held_for).saturating_sub(MARGIN));
        (moment <= reclaim.over).then_some(moment)
    };
    reclaims.iter().filter_map(moment).min()
}

/// The first moment at which a delivery may have been taken back because its stream was left, unless it was taken over after that.
fn grace_over(tries: &[&Try], left: &[&Leaving]) -> Option<Duration> {
    let resumed = tries.iter().filter(|one| matches!(one.intent, Intent::Resume(_))).map(|one| one.sent).max();
    let counts = |leaving: &&&Leaving| resumed.is_none_or(|resumed| leaving.at >= resumed);
    left.iter().filter(counts).map(|leaving| (leaving.at + GRACE).saturating_sub(MARGIN)).min()
}

fn outcome(one: &Try) -> Option<Outcome> {
    one.answer.map(|answer| answer.outcome)
}
