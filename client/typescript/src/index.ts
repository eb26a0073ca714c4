export { DataQueueError, Reject } from "./errors.js";
export { connect, stub, type CallOptions, type Stub } from "./grpc.js";
export { Batch, Producer, type BatchOptions, type InsertOptions, type TaskInput } from "./producer.js";
export { Worker, type Handler, type Task, type WorkerOptions } from "./worker.js";
export * from "./gen/dataqueue/v1/data_queue_pb.js";
export * from "./gen/dataqueue/v1/queue_admin_pb.js";
