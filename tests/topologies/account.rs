//! What a fault of the store cost: the guarantees that a history breaks, by what a failover may take back and what must hold always.
//! Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::histories::{
    checker::{Fault, faults},
    recorder::History,
};

/// Of tasks, each counted once in each class.
#[derive(Debug, Default)]
pub struct Account {
    /// Tasks whose insert was answered OK.
    pub inserted: usize,
    /// Of those, never acked, and not there any more.
    pub lost: usize,
    /// Of those, never even delivered.
    pub undelivered: usize,
    /// Of the lost, those whose OK said that a replica has them.
    pub replicated_lost: usize,
    /// Delivered or acked again, though their ack was answered OK.
    pub after_ack: usize,
    /// Held by two at the same time.
    pub held_twice: usize,
    /// Delivered under an id that is not the one that their insert was answered with in the end.
    pub inserted_twice: usize,
    /// Of which a lease was lost early, or a delivery is not counted.
    pub set_back: usize,
    pub tokens_repeated: usize,
    /// Delivered, and never sent.
    pub phantoms: usize,
    /// Any other guarantee.
    pub wrong: BTreeSet<Fault>,
}

/// Given the texts that were sent, and the ids of which it was said that a replica has them.
pub fn account(history: &History, sent: &BTreeSet<String>, replicated: &BTreeSet<String>) -> Account {
    let mut account =
        Account { inserted: history.inserts.iter().map(|insert| insert.ids.len()).sum(), ..Account::default() };
    let mut texts: BTreeMap<&str, &str> = BTreeMap::new();
    texts.extend(history.deliveries.iter().map(|delivery| (delivery.id.as_str(), delivery.text.as_str())));
    let mut set_back = BTreeSet::new();
    let mut after_ack = BTreeSet::new();
    for fault in faults(history) {
        match fault {
            Fault::Lost { id } => {
                account.lost += 1;
                account.undelivered += usize::from(!texts.contains_key(id.as_str()));
                account.replicated_lost += usize::from(replicated.contains(&id));
            }
            Fault::Phantom { id } if texts.get(id.as_str()).is_some_and(|text| sent.contains(*text)) => {
                account.inserted_twice += 1;
            }
            Fault::Phantom { .. } => account.phantoms += 1,
            Fault::TokenRepeated { .. } => account.tokens_repeated += 1,
            Fault::HeldTwice { .. } => account.held_twice += 1,
            Fault::AckedTwice { id } | Fault::AfterAck { id } => drop(after_ack.insert(id)),
            Fault::Miscounted { id } => drop(set_back.insert(id)),
            Fault::LostEarly { token } => {
                let task = history.deliveries.iter().find(|delivery| delivery.token == token);
                set_back.insert(task.map_or(token, |task| task.id.clone()));
            }
            other => drop(account.wrong.insert(other)),
        }
    }
    (account.after_ack, account.set_back) = (after_ack.len(), set_back.len());
    account
}

impl Account {
    /// What must not have been, given whether the store may go back to an earlier state.
    pub fn violations(&self, may_go_back: bool) -> Vec<String> {
        let always = [
            ("lost, though a replica had them", self.replicated_lost),
            ("tokens repeated", self.tokens_repeated),
            ("phantoms", self.phantoms),
            ("wrong", self.wrong.len()),
        ];
        let otherwise = [
            ("lost", self.lost),
            ("back after their ack", self.after_ack),
            ("held twice", self.held_twice),
            ("inserted twice", self.inserted_twice),
            ("set back", self.set_back),
        ];
        let otherwise = otherwise.into_iter().filter(|_| !may_go_back);
        let broken = always.into_iter().chain(otherwise).filter(|(_, count)| *count > 0);
        broken.map(|(what, count)| format!("{count} {what}")).collect()
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { inserted, lost, undelivered, after_ack, held_twice, inserted_twice, set_back, .. } = self;
        write!(
            f,
            "{inserted} inserted OK | {lost} lost, {undelivered} of them never delivered | {after_ack} back after ack | "
        )?;
        write!(f, "{held_twice} held twice, {inserted_twice} inserted twice, {set_back} set back | ")?;
        write!(f, "{} tokens repeated, {} phantoms", self.tokens_repeated, self.phantoms)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use data_queue_proto::v1::Outcome;

    use super::*;
    use crate::histories::recorder::{Answer, Delivery, Insert, Intent, Try};

    const fn at(second: u64) -> Duration {
        Duration::from_secs(second)
    }

    fn inserted(ids: &[&str]) -> Insert {
        let texts = ids.iter().map(|id| format!("text of {id}")).collect();
        Insert { texts, ids: ids.iter().map(|id| (*id).to_owned()).collect(), replayed: false, sent: 1 }
    }

    fn delivered(id: &str, token: &str, second: u64) -> Delivery {
        Delivery {
            call: String::new(),
            session: None,
            id: id.to_owned(),
            token: token.to_owned(),
            text: format!("text of {id}"),
            deliveries: 1,
            expiries: 0,
            first_sent: at(second),
            sent: at(second),
            answered: at(second),
            left: at(1),
        }
    }

    fn acked(token: &str, second: u64) -> Try {
        let answer = Some(Answer { at: at(second), outcome: Outcome::Applied, left: None });
        Try { token: token.to_owned(), intent: Intent::Ack, sent: at(second), answer }
    }

    fn sent() -> BTreeSet<String> {
        ["a", "b", "c"].map(|id| format!("text of {id}")).into()
    }

    /// What a failover may take back is no fault after one; what a replica had is.
    #[test]
    fn what_was_replicated_must_not_be_lost() {
        let history = History {
            inserts: vec![inserted(&["a", "b"])],
            deliveries: vec![delivered("a", "t1", 1)],
            tries: vec![acked("t1", 1)],
            ..History::default()
        };
        let found = account(&history, &sent(), &["a".to_owned()].into());
        assert_eq!((found.inserted, found.lost, found.undelivered, found.replicated_lost), (2, 1, 1, 0));
        assert_eq!(found.violations(true), [""; 0]);
        assert_eq!(found.violations(false), ["1 lost"]);
        let found = account(&history, &sent(), &["b".to_owned()].into());
        assert_eq!(found.violations(true), ["1 lost, though a replica had them"]);
    }

    /// Tasks that come back, and those inserted anew as nobody remembered them; what was never sent and tokens that come again.
    #[test]
    fn classes_are_told_apart() {
        let mut again = delivered("a", "t2", 5);
        again.deliveries = 2;
        let history = History {
            inserts: vec![inserted(&["a"])],
            deliveries: vec![delivered("a", "t1", 1), again, delivered("b", "t3", 1), delivered("x", "t3", 9)],
            tries: vec![acked("t1", 1), acked("t2", 6)],
            ..History::default()
        };
        let found = account(&history, &sent(), &BTreeSet::new());
        assert_eq!((found.lost, found.after_ack, found.inserted_twice), (0, 1, 1));
        assert_eq!((found.phantoms, found.tokens_repeated, found.held_twice), (1, 1, 0));
        assert_eq!(found.violations(true), ["1 tokens repeated", "1 phantoms"]);
    }
}
