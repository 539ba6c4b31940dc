// Who changes something says so here; who shows it listens. Modules need not know each other.

const bus = new EventTarget();

export function emit(type, detail) {
  bus.dispatchEvent(new CustomEvent(type, { detail }));
}

export function listen(type, handler) {
  bus.addEventListener(type, (event) => handler(event.detail));
}
