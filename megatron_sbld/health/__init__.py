"""Lost, stalled and doubled processes."""
