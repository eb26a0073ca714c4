"""The load of the seed of this project, from which DataQueue took its idea: the same Redis commands for each task, in the same
order, one round trip each, from Python with redis-py.

    insert_data   LPUSH
    pop_data      EXISTS, RPOP, then ZADD of the value's MD5 with the time, and SET of the value in another database
    pop_data_num  EXISTS, a pipeline of RPOPs, then ZADD and SET for each
    delete_task   ZREM and DEL

It is told what to do line by line, as program.rs says. Its queue gives no tokens, so that a ZREM and a DEL which both found the
task are its ack.
"""

import hashlib
import json
import platform
import sys
import time

import redis

QUEUE, HELD = "bench_data_queue", "bench_task_queue"
DIGITS = 12


def payload(number, size):
    return f"{number:0{DIGITS}d}".ljust(size, chr(ord("a") + number % 26))


class Queue:
    def __init__(self, port):
        self.queue = redis.StrictRedis(port=port, db=1)
        self.cache = redis.StrictRedis(port=port, db=2)

    def insert(self, value):
        self.queue.lpush(QUEUE, json.dumps(value))

    def hold(self, text):
        value = json.loads(text)
        key = hashlib.md5(str(value).encode()).hexdigest()
        self.queue.zadd(HELD, {key: time.time()})
        self.cache.set(key, text)
        return key, value

    def pop(self):
        if not self.queue.exists(QUEUE):
            return []
        text = self.queue.rpop(QUEUE)
        return [] if text is None else [self.hold(text.decode())]

    def pop_many(self, count):
        if not self.queue.exists(QUEUE):
            return []
        with self.queue.pipeline() as pipeline:
            for _ in range(count):
                pipeline.rpop(QUEUE)
            texts = pipeline.execute()
        return [self.hold(text.decode()) for text in texts if text is not None]

    def delete(self, key):
        return self.queue.zrem(HELD, key) == 1 and self.cache.delete(key) == 1

    def left(self):
        return self.queue.llen(QUEUE) + self.queue.zcard(HELD) + self.cache.dbsize()


def drain(queue, batch, count, size):
    delivered, acked = [], 0
    while len(delivered) < count:
        tasks = queue.pop() if batch == 1 else queue.pop_many(batch)
        if not tasks:
            sys.exit("the queue was empty too early")
        for key, value in tasks:
            number = int(value[:DIGITS])
            if value != payload(number, size):
                sys.exit(f"task {number} came with another payload")
            delivered.append(number)
            acked += queue.delete(key)
    return {"delivered": delivered, "acked": acked}


def main():
    batch, port = sys.argv[1:]
    if port == "version":
        parser = "with hiredis" if redis.utils.HIREDIS_AVAILABLE else "without hiredis"
        print(f"{platform.python_version()} and {redis.__version__} {parser}")
        return
    queue = Queue(int(port))
    for line in sys.stdin:
        command, *words = line.split()
        numbers = [int(word) for word in words]
        if command == "fill":
            first, count, size = numbers
            for number in range(first, first + count):
                queue.insert(payload(number, size))
            answer = {"inserted": count}
        elif command == "drain":
            answer = drain(queue, int(batch), *numbers)
        else:
            answer = {"left": queue.left()}
        print(json.dumps(answer), flush=True)


main()
